"""What a wheel gets beside the modules: the recipes and the lists of the microworld"""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithFiles(build_py):
    def run(self):
        super().run()
        if self.editable_mode: return  # they lie beside the package
        files = Path(self.build_lib) / 'lm_nb' / 'files'
        (files / 'data').mkdir(parents=True, exist_ok=True)
        for name in ('settings.ini', 'grids.ini'): shutil.copy(ROOT / name, files)
        shutil.copytree(ROOT / 'data' / 'microworld', files / 'data' / 'microworld',
                        dirs_exist_ok=True)


setup(cmdclass={'build_py': BuildWithFiles})
