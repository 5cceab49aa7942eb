"""Write the golden arrays from transformers in float64: ``python tests/golden/make.py`` (needs
torch)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from golden.torch_models import main

if __name__ == "__main__":
    main()
