"""A size limit for uploaded files. Django has none, and writes them to temporary files."""

from typing import Any

from django.conf import settings
from django.core.exceptions import RequestDataTooBig
from django.core.files.uploadhandler import FileUploadHandler


class LimitedUploadHandler(FileUploadHandler):
    """Rejects requests with more than ``UPLOAD_MAX_SIZE`` bytes of files in total."""

    def handle_raw_input(
        self,
        input_data: Any,
        META: Any,
        content_length: int,
        boundary: str,
        encoding: str | None = None,
    ) -> None:
        """Raise RequestDataTooBig before any byte is read."""
        if content_length > settings.UPLOAD_MAX_SIZE:
            raise RequestDataTooBig("The uploaded files are larger than UPLOAD_MAX_SIZE.")

    def receive_data_chunk(self, raw_data: bytes, start: int) -> bytes:
        """Pass the data to the next handler."""
        return raw_data

    def file_complete(self, file_size: int) -> None:
        """Pass the file to the next handler."""
