"""`python -m dynconv_cli`, where the `dynconv` script is not on the path."""

from .app import main

main()
