"""`python -m folovllm` is the command line, the same as the script `folovllm`."""

from folovllm.frontend.cli.main import main

if __name__ == "__main__":
    main(prog_name="folovllm")
