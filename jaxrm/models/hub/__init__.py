"""Published weights in (safetensors folders, hub names, GGUF files, PEFT's adapters) and out."""

from jaxrm.models.hub.classifier import (
    ClassifierParams,
    check_classifier,
    is_classifier,
    load_classifier,
    read_classifier_config,
)
from jaxrm.models.hub.export import export_model
from jaxrm.models.hub.export_folder import check_export_folder
from jaxrm.models.hub.hf_config import parse_hf_config, to_hf_config
from jaxrm.models.hub.locate import adapter_files, is_hub_name, model_files
from jaxrm.models.hub.peft import Adapter, describe_adapter, read_adapter, write_adapter
from jaxrm.models.hub.read import check_weights, load_params, read_model_config

__all__ = [
    "Adapter",
    "ClassifierParams",
    "adapter_files",
    "check_classifier",
    "check_export_folder",
    "check_weights",
    "describe_adapter",
    "export_model",
    "is_classifier",
    "is_hub_name",
    "load_classifier",
    "load_params",
    "model_files",
    "parse_hf_config",
    "read_adapter",
    "read_classifier_config",
    "read_model_config",
    "to_hf_config",
    "write_adapter",
]
