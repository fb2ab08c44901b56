"""`python -m ear_teacher_cli` is `earteach`."""

from .cli.app import main

if __name__ == "__main__":
    main()
