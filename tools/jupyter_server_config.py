"""JupyterLab's server: a saved notebook is cleaned as nbdev cleans it, so that opening or running
one leaves no trace in git."""
from pathlib import Path

from nbdev.clean import clean_jupyter


def clean(model, path, contents_manager, **kwargs):
    clean_jupyter(path=Path(contents_manager.root_dir) / path, model=model)


c.FileContentsManager.pre_save_hook = clean  # noqa: F821  Jupyter hands `c` in
