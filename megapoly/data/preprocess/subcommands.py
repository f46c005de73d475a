"""Modules of the sub-commands of ``megapoly preprocess``."""

# Each a module with `add_arguments(parser)` and `run(options) -> exit status`.
COMMANDS = {
    "verify": "megapoly.data.preprocess.verify",
    "merge": "megapoly.data.preprocess.merge",
    "inspect": "megapoly.data.preprocess.inspect_pair",
    "stats": "megapoly.data.preprocess.stats",
}
