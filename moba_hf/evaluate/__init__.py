"""What MoBA costs in quality: perplexity by position, agreement with dense, recall of the choice, tasks."""

from moba_hf.evaluate.agreement import Agreement, agreement
from moba_hf.evaluate.perplexity import Perplexity, perplexity, summarize, token_losses
from moba_hf.evaluate.recall import Recall, recall
from moba_hf.evaluate.results import Store, format_table
from moba_hf.evaluate.tasks import TASKS, Sample, SampleSize, TaskScore, make_sample, run_task, score_answer

__all__ = [
    "TASKS",
    "Agreement",
    "Perplexity",
    "Recall",
    "Sample",
    "SampleSize",
    "Store",
    "TaskScore",
    "agreement",
    "format_table",
    "make_sample",
    "perplexity",
    "recall",
    "run_task",
    "score_answer",
    "summarize",
    "token_losses",
]
