"""The root of the API, and the response to paths that it does not have, both in JSON.

A project includes these URLs after those of its API: ``path("api/", include(root))``.
"""

from contextlib import suppress

from django.http import HttpRequest, HttpResponse, HttpResponsePermanentRedirect, JsonResponse
from django.urls import NoReverseMatch, Resolver404, path, resolve, reverse
from django.views.decorators.csrf import csrf_exempt

#: The names of the URLs that the root links to, by key.
LINKS = {"documentation": "docs", "schema": "schema", "token": "token"}


def get_links(request: HttpRequest) -> dict[str, str]:
    """Return the absolute URLs that the service has, by key."""
    links = {}
    for key, name in LINKS.items():
        with suppress(NoReverseMatch):
            links[key] = request.build_absolute_uri(reverse(name))
    return links


def show_root(request: HttpRequest) -> HttpResponse:
    """Respond with the addresses of the documentation, the schema and the tokens."""
    return JsonResponse(get_links(request))


@csrf_exempt  # It changes nothing.
def not_found(request: HttpRequest, rest: str) -> HttpResponse:
    """Respond to an unknown path with status 404; redirect a GET to the path with a slash."""
    detail = f"There is no {request.path} in this API."
    if not rest.endswith("/") and exists(f"{request.path_info}/"):
        if request.method in ("GET", "HEAD"):
            return HttpResponsePermanentRedirect(request.get_full_path(force_append_slash=True))
        detail = f"The path ends with a slash: {request.path}/"
    links = get_links(request)
    links.pop("token", None)
    return JsonResponse({"detail": detail, **links}, status=404)


def exists(path_info: str) -> bool:
    """Return whether a path has a view of its own."""
    try:
        return resolve(path_info).func is not not_found
    except Resolver404:
        return False


urlpatterns = [path("", show_root, name="api"), path("<path:rest>", not_found)]
