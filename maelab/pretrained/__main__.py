"""python -m maelab.pretrained RUN NAME [OTHER...]"""

import sys

from maelab.errors import MaelabError, UsageError
from maelab.pretrained import ship

try:
    if len(sys.argv) < 3:
        raise UsageError("usage: python -m maelab.pretrained RUN NAME [OTHER...]")
    print(ship(sys.argv[1], sys.argv[2], sys.argv[3:]))
except MaelabError as error:
    print(f"maelab: {error}", file=sys.stderr)
    sys.exit(error.exit_status)
