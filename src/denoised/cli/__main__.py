"""`python -m denoised.cli`."""

from denoised.cli import main

main()
