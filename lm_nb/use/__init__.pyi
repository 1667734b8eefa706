# Written by tools/export.py from what the modules of this part export.
from .export import (
    write_gguf as write_gguf,
    write_onnx as write_onnx,
    export_model as export_model,
)
from .serve import (
    Served as Served,
    ServeConfig as ServeConfig,
    serve_models as serve_models,
    serving as serving,
    find_models as find_models,
)
