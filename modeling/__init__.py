"""Models whose experts are more than feed-forward layers; importing this registers them with transformers."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_mop import MopConfig
from .configuration_more import MoreConfig
from .configuration_tiered_moe import TieredMoeConfig
from .environment_detector import EnvironmentDetector
from .expert_store import ExpertStore, ExpertStoreConfig
from .lazy_adamw import LazyAdamW
from .modeling_mop import MopForActionPrediction, MopModel, MopPreTrainedModel, MopState
from .modeling_more import MoreForCausalLM, MoreModel, MorePreTrainedModel
from .modeling_tiered_moe import TieredMoeForActorCritic, TieredMoeModel, TieredMoePreTrainedModel, TieredMoeState
from .offloaded_experts import initialize_offloaded, load_offloaded, offload_experts

AutoConfig.register("more", MoreConfig, exist_ok=True)
AutoModel.register(MoreConfig, MoreModel, exist_ok=True)
AutoModelForCausalLM.register(MoreConfig, MoreForCausalLM, exist_ok=True)
MoreConfig.register_for_auto_class()
MoreModel.register_for_auto_class("AutoModel")
MoreForCausalLM.register_for_auto_class("AutoModelForCausalLM")

AutoConfig.register("mop", MopConfig, exist_ok=True)
# Policies have no auto class of their own: `AutoModel` takes the one that the configuration names.
AutoModel.register(MopConfig, (MopForActionPrediction, MopModel), exist_ok=True)
MopConfig.register_for_auto_class()
MopModel.register_for_auto_class("AutoModel")
MopForActionPrediction.register_for_auto_class("AutoModel")

AutoConfig.register("tiered_moe", TieredMoeConfig, exist_ok=True)
AutoModel.register(TieredMoeConfig, (TieredMoeForActorCritic, TieredMoeModel), exist_ok=True)
TieredMoeConfig.register_for_auto_class()
TieredMoeModel.register_for_auto_class("AutoModel")
TieredMoeForActorCritic.register_for_auto_class("AutoModel")

__all__ = [
    "EnvironmentDetector",
    "ExpertStore",
    "ExpertStoreConfig",
    "LazyAdamW",
    "MopConfig",
    "MopForActionPrediction",
    "MopModel",
    "MopPreTrainedModel",
    "MopState",
    "MoreConfig",
    "MoreForCausalLM",
    "MoreModel",
    "MorePreTrainedModel",
    "TieredMoeConfig",
    "TieredMoeForActorCritic",
    "TieredMoeModel",
    "TieredMoePreTrainedModel",
    "TieredMoeState",
    "initialize_offloaded",
    "load_offloaded",
    "offload_experts",
]
