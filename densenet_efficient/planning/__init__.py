"""What a training step and an inference will take of memory, and the levels of checkpointing that fit a budget."""

from .planner import MemoryPlan, plan
from .timeline import Memory, Peak, StageMemory

__all__ = ["Memory", "MemoryPlan", "Peak", "StageMemory", "plan"]
