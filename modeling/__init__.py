"""Models whose experts are more than feed-forward layers; importing this registers them with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_more import MoreConfig
from .modeling_more import MoreForCausalLM, MoreModel, MorePreTrainedModel

AutoConfig.register("more", MoreConfig, exist_ok=True)
AutoModel.register(MoreConfig, MoreModel, exist_ok=True)
AutoModelForCausalLM.register(MoreConfig, MoreForCausalLM, exist_ok=True)
MoreConfig.register_for_auto_class()
MoreModel.register_for_auto_class("AutoModel")
MoreForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MoreConfig", "MoreForCausalLM", "MoreModel", "MorePreTrainedModel"]
