"""Everything that a rank needs, imported once by the fork server."""

import contextlib
import os
import warnings

# Read when tqdm is imported: hides the progress bars of libraries on every rank.
os.environ.setdefault("TQDM_DISABLE", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megapoly.platform import engine_workarounds

    engine_workarounds.install_on_cpu()
    import megapoly.data.corpus
    import megapoly.training.load_checkpoint
    import megapoly.training.loop
    import megapoly.training.rank_zero_first  # noqa: F401
    import megapoly.training.reporter
    import megapoly.training.tensorboard

    with contextlib.suppress(ImportError):  # the harness is an extra
        import megapoly.evaluation.engine_lm
        import megapoly.evaluation.transformers_lm  # noqa: F401
