"""What a model keeps of a text, and what its predictions lean on, as one HTML page.

    gateloop inspect --checkpoint runs/quick --text FILE --out page.html

>>> from gateloop_cpp.inspection import measure, render
>>> html = render(measure(model, text), title="a text", source="a model")

docs/inspect.md defines every number. The name is not ``inspect``, which the standard library has:
Python started in the folder of this package would find this one in its place.
"""

from gateloop_cpp.inspection.measuring import Measurements, Mixer, Track, measure
from gateloop_cpp.inspection.rendering import render

__all__ = ["Measurements", "Mixer", "Track", "measure", "render"]
