"""The words of the pass-key prompt (Mohtashami and Jaggi 2023, arXiv 2305.16300), which LongLoRA's authors evaluate with.

`passkey` asks in them, and `blocks.recall.passkey` says whether exercises may be in them too: so they stand here once.
"""

LABEL = "pass key"
PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
FACT = "The {label} is {value}. Remember it. {value} is the {label}.\n"
QUESTION = "What is the {label}?"
LEAD = "The {label} is"
"""How the answer begins; the value follows."""
