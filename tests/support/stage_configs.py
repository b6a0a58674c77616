"""Configs of stages from what several stages have in common."""

import dataclasses

from jaxrm.stage_config import STAGES


def stage_config(algorithm, *, evaluation=None, **sections):
    """The config of a stage.

    Args:
      algorithm: name of the stage.
      evaluation: fields of the section ``evaluation``; those that the stage does not read are left out.
      sections: fields of the config; those that the stage does not have are left out.
    """
    config_class = STAGES[algorithm].config_class
    names = {field.name for field in dataclasses.fields(config_class)}
    kept = {name: value for name, value in sections.items() if name in names}
    if evaluation is not None and "evaluation" in names:
        section = type(config_class().evaluation)
        fields = {field.name for field in dataclasses.fields(section)}
        kept["evaluation"] = section(**{name: value for name, value in evaluation.items() if name in fields})
    return config_class(**kept)
