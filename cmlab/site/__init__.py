"""The series as a static site (`cmlab site`): lessons as they were run, their solutions, and the package's reference. No network."""

from cmlab.site.builder import build
from cmlab.site.links import dead_links

__all__ = ["build", "dead_links"]
