"""The storage of static files in production."""

from whitenoise.storage import CompressedManifestStaticFilesStorage


class ManifestStorage(CompressedManifestStaticFilesStorage):  # type: ignore[misc]
    """WhiteNoise's storage, whose URLs need no manifest: pages work before ``collectstatic``.

    If there is a manifest, a file that is not in it is an error, as in Django.
    """

    def stored_name(self, name: str) -> str:
        """Return the hashed name; the name itself if no files were collected."""
        if not self.hashed_files:
            return name
        stored: str = super().stored_name(name)
        return stored
