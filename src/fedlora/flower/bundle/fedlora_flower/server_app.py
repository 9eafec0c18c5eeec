"""The server's entry point: the run that a request asks for, over Flower's grid."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.flower.server import serve

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train until the last round."""
    serve(grid, str(context.run_config["request"]))
