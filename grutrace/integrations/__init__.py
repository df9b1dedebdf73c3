"""Gates where people log already: TensorBoard, Weights & Biases, MLflow, Lightning, Hugging Face.

`GateLogger` records a model batch by batch and writes histograms and scalars of its gates to logs.
`grutrace.integrations.lightning` and `grutrace.integrations.huggingface` have a callback each.
docs/logging.md is the how-to.
"""

from grutrace.integrations.figures import Figures, Histogram
from grutrace.integrations.gate_logger import GateLogger, Log
from grutrace.integrations.mlflow import MLflowLog
from grutrace.integrations.tensorboard import TensorBoardLog
from grutrace.integrations.wandb import WandbLog

__all__ = ["Figures", "GateLogger", "Histogram", "Log", "MLflowLog", "TensorBoardLog", "WandbLog"]
