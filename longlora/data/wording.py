"""The words in which a question on a document is put to a model: the same in training, in scoring and in use."""

UNSAID = "The document does not say."
"""The answer to a question that the document leaves open."""
PLAIN_LEAD = "\nAnswer:"
"""What follows the question in a plain prompt, which is text to be continued."""

READ = "Read the following text, and answer the question after it from the text alone, in as few words as possible.\n\n"
"""What stands before the document."""
LEAD = "\n\nQuestion:"
"""What stands between the document and the question. Tokenizers may join its line breaks to the document's last sign, and never
anything to its colon, behind which a space follows: what is read before a question, once for all of them, ends there."""


def asked(document: str, question: str) -> str:
    return before_question(document) + the_question(question)


def before_question(document: str) -> str:
    return f"{READ}{document}{LEAD}"


def the_question(question: str) -> str:
    """What a chat template would leave out around it is left out for all."""
    return f" {question.strip()}"
