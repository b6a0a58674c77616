"""Published weights in (safetensors folders, hub names, GGUF files) and out (safetensors folders)."""

from jaxrm.models.hub.export import export_model
from jaxrm.models.hub.export_folder import check_export_folder
from jaxrm.models.hub.hf_config import parse_hf_config, to_hf_config
from jaxrm.models.hub.locate import is_hub_name, model_files
from jaxrm.models.hub.read import check_weights, load_params, read_model_config

__all__ = [
    "check_export_folder",
    "check_weights",
    "export_model",
    "is_hub_name",
    "load_params",
    "model_files",
    "parse_hf_config",
    "read_model_config",
    "to_hf_config",
]
