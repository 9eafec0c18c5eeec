"""A node's entry point: every message goes to the node's worker."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora.flower.messenger import handle

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """An update for a task."""
    return handle(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """What the node has."""
    return handle(message, context)
