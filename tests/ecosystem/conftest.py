"""Jobs of other libraries' models and data sets, on every rank of `mpirun -np N python -m pytest tests/ecosystem` together.

make test-ecosystem installs the libraries into a folder of their own, .ecosystem, and runs the tests on 1 and on 2 workers. Nothing is
downloaded when the tests run.
"""

import os
import sys

from support.launching import ROOT
from support.ranks import *  # noqa: F403

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.append(str(ROOT / "jobs/ecosystem"))  # where jobs find their parts
