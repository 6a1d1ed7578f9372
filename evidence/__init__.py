"""What the promises are measured by: a package for each page that has results.

`nox -s bench`, `soak` and `interop` run them; `python -m evidence` writes the pages anew
from the results that are stored. The modules beside the packages are what they share.
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
