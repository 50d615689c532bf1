"""`python -m text3d_fast` is the command line `text3d-fast`."""

from text3d_fast.app import main

raise SystemExit(main())
