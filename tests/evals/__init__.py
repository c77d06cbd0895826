"""Tests of evals. No network: set before anything imports datasets, which reads these once."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
if "HF_HOME" not in os.environ:
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="evals-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
