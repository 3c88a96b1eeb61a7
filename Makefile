# Every target sets itself up on a fresh clone; the work is in scripts/.
.PHONY: demo demo-vlm test lint

demo demo-vlm test lint: .venv/installed
	scripts/$@

.venv/installed: requirements.txt pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet uv
	.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --requirements requirements.txt
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
	touch $@
