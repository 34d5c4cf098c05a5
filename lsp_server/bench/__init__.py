"""--bench: replay recorded keystrokes against the real server over stdio and report what each kind of edit costs.

    trace.py     a recorded typing session, validated            client.py   the editor's side of LSP
    replay.py    trace + server -> samples                       infill.py   the same trace on a llama-server
    report.py    samples -> percentiles, one JSON document       table.py, page.py, chart.py   the report for people
"""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """What follows --bench on the command line. Imported late: reading a trace needs nothing to print with."""
    from inference_pio.lsp_server.bench.command import main

    return main(argv)
