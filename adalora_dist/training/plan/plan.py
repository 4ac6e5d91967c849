"""``adalora-dist plan``: does a run fit, what travels, how long may it take; and the smallest change that makes it fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from adalora_dist.artifacts.tables import aligned
from adalora_dist.backbones.fit import lengths_of
from adalora_dist.backbones.linears import is_linear
from adalora_dist.backbones.load import dtype_named
from adalora_dist.config.methods import AdaLoraConfig
from adalora_dist.config.sections import RunConfig
from adalora_dist.io.progress import duration
from adalora_dist.methods.adalora.schedule import BudgetSchedule
from adalora_dist.methods.adalora.layers import SVDLinear
from adalora_dist.methods.protocol import adapters_of
from adalora_dist.sharding.spans import FACTORS_OF_MATRIX, Factor
from adalora_dist.training.plan.cluster import USABLE, Cluster
from adalora_dist.training.plan.estimate import Time, Traffic, time_of, traffic_of
from adalora_dist.training.plan.fake import step_bytes
from adalora_dist.training.plan.memory import FLOAT32, Memory, Tensor, after_freeze, memory_of

SIZES_GB = (24, 48, 80)
"""GPUs that are told of in any case."""
