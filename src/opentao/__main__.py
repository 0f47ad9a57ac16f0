"""`python -m opentao` is the command `tao`."""

from opentao.cli import app

if __name__ == "__main__":
    app(prog_name="tao")
