"""`python -m ear_teacher_cli` is `earteach`."""

from .cli import main

main()
