"""The demo: `gradio app.py` while you change it, `python app.py` or `cmlab app` to use it."""

from cmlab.demo import build, launch

demo = build()

if __name__ == "__main__":
    launch(demo)
