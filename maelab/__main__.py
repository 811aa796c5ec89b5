from maelab.cli import main

raise SystemExit(main())
