"""Of konic 0.1, and not offered: importing it says what to use instead."""

from konic.finetuning.successors import module_not_offered

raise module_not_offered(__name__)
