"""How `make lab` starts JupyterLab: at the repository, with its home page open, and so that a
chapter which is opened, run or saved leaves no unsaved dot and no trace in git."""
import logging
import warnings
from pathlib import Path

import zmq
from ipykernel.ipkernel import IPythonKernel
from jupyter_client.kernelspec import get_kernel_spec
from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
from nbdev.clean import clean_nb
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent


def clean(model, **kwargs):
    "A notebook is saved as nbdev cleans it; the marks of trusted cells are Jupyter's to take out"
    if model['type'] != 'notebook' or model['content']['nbformat'] != 4: return
    config, cells = get_config(path=ROOT), model['content']['cells']
    trusted = [c for c in cells if c['metadata'].get('trusted')]
    clean_nb(model['content'], clean_ids=config.clean_ids,
             allowed_out_metadata_keys=config.allowed_out_metadata_keys)
    for c in trusted: c['metadata']['trusted'] = True


def kernel():
    "What JupyterLab writes into a notebook when its kernel runs, and nbdev takes out again"
    spec = get_kernel_spec('python3')
    names = dict(name='python3', display_name=spec.display_name, language=spec.language)
    return dict(kernelspec=names, language_info=dict(IPythonKernel.language_info))


class Chapters(AsyncLargeFileManager):
    "Files; a notebook comes with the words of its kernel, so that starting it changes nothing"
    async def get(self, path, content=True, *args, **kwargs):
        model = await super().get(path, content, *args, **kwargs)
        if content and model['type'] == 'notebook':
            about = model['content']['metadata']
            if about.get('kernelspec', {}).get('name') == 'python3': about.update(kernel())
        return model


c = c  # noqa: F821  Jupyter hands `c` in
c.ServerApp.root_dir = str(ROOT)
c.LabApp.default_url = '/lab/tree/README.md'
c.LabApp.app_settings_dir = str(ROOT / 'tools/lab')
c.LabApp.workspaces_dir = str(ROOT / '.venv/share/jupyter/lab/workspaces')  # tabs of this project
c.ServerApp.contents_manager_class = Chapters
c.FileContentsManager.pre_save_hook = clean
c.ServerApp.jpserver_extensions = {'jupyterlab_jupytext': False}  # it would open .py as notebooks
c.ServerApp.allow_root = True  # in a container everybody is root; the address has a token

# What is said at the start is the address
c.Application.log_level = 'WARN'
c.KernelManager.transport_encryption = 'auto' if zmq.has('curve') else 'disabled'
warnings.filterwarnings('ignore', 'Overriding existing pre_save_hook')  # with itself
logging.getLogger('tornado.general').addFilter(  # it reads Jupyter's milliseconds as seconds
    lambda record: 'websocket_ping' not in record.getMessage())
