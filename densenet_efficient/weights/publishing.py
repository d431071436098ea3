"""What huggingface_hub writes and uploads; imported only where something is published."""

from __future__ import annotations

from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

MODEL_CARD = """---
{{ card_data }}
---

# A DenseNet of densenet_efficient

```python
from densenet_efficient import EfficientDenseNet

model = EfficientDenseNet.from_pretrained("this repository")
```

Where `config.json` describes a preprocessing, `model.weights.transforms()` gives it.
The architecture: {{ paper_url }}
"""


class Published(
    PyTorchModelHubMixin,
    library_name="densenet_efficient",
    pipeline_tag="image-classification",
    tags=["densenet"],
    paper_url="https://arxiv.org/abs/1608.06993",
    model_card_template=MODEL_CARD,
):
    """A module with the description that becomes ``config.json``; the mixin saves the weights of ``module``."""

    def __init__(self, module: nn.Module, description: dict[str, Any]) -> None:
        self.module = module
        self._hub_mixin_config = description
