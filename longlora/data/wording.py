"""The words in which a question on a document is put to a model: the same in training, in scoring and in use."""

UNSAID = "The document does not say."
"""The answer to a question that the document leaves open."""
PLAIN_LEAD = "\nAnswer:"
"""What follows the question in a plain prompt, which is text to be continued."""


def asked(document: str, question: str) -> str:
    return f"{before_question(document)}{after_document(question)}"


def before_question(document: str) -> str:
    return (
        "Read the following text, and answer the question after it from the text alone, in as few words as possible.\n\n"
        + document
    )


def after_document(question: str) -> str:
    return f"\n\nQuestion: {question}"
