"""Each case in its own process: an import happens once."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_datasets_and_models_import():
    done = run(
        "from lad_dist.data.torchvision_import import import_torchvision\n"
        "tv = import_torchvision()\n"
        "assert import_torchvision() is tv\n"
        "import torchvision.datasets, torchvision.models, torchvision.transforms\n"
        "print(torchvision.models.resnet18(num_classes=2).fc.out_features)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_nothing_is_declared_where_torchvision_imports_by_itself():
    plain = run("import torchvision")
    declared = run(
        "from lad_dist.data import torchvision_import as t\n"
        "t.import_torchvision()\n"
        "print(t._declare_operators.cache_info().currsize)"
    )
    assert declared.returncode == 0, declared.stderr
    assert declared.stdout.strip() == ("0" if plain.returncode == 0 else "1")


def test_nothing_is_declared_beside_a_cuda_torch():
    """Where its import fails all the same, torchvision's own message is what the user gets."""
    done = run(
        "import torch; torch.version.cuda = '13.0'\n"
        "from lad_dist.data import torchvision_import as t\n"
        "try:\n    t.import_torchvision()\n"
        "except RuntimeError as error:\n    assert 'torchvision::nms' in str(error)\n"
        "print(t._declare_operators.cache_info().currsize)"
    )
    assert done.stdout.strip() == "0", done.stderr
