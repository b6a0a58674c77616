"""Trained models in use: the library that commands, stages and notebooks share."""

from jaxrm.config.quiet import silence_libraries

silence_libraries()
