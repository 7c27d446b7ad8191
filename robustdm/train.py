"""``python -m robustdm.train``: train a diffusion model that survives noisy data."""

from __future__ import annotations

from collections.abc import Sequence

from robustdm.cli import guard, on_main_rank, parse_train


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, train, and say where the results are; returns the exit code."""
    config = parse_train(argv)
    from robustdm.training.loop import train  # torch loads here, after every usage error

    result = train(config)
    if config.dry_run:
        return 0
    if result.summary:
        from robustdm.reporting.tables import text_table

        print(text_table(result.summary["measures"]))
        print(f"report: {result.directory / 'report.html'}")
    if result.stopped and on_main_rank():
        print(
            f"stopped after step {result.step} ({result.stopped}); continue with: "
            f"python -m robustdm.train --resume --out {result.directory}"
        )
    return result.exit_code


if __name__ == "__main__":
    guard(main)
