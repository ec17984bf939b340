"""The studio: a web page to draw with students and to watch runs (docs/studio.md).

`runs` reads a folder of runs, `desk` holds the models, `pages` makes HTML of both; these know no gradio and are tested
alone. `app` puts them into a page. It needs the extra `studio`.
"""
