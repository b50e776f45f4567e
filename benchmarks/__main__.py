from benchmarks.cli import app

app(prog_name="ual-bench")
