"""The group of moderators, who may view and change submissions and nothing else."""

from django.db import migrations

MODERATORS = "moderators"
PERMISSIONS = {
    "view_submission": "Can view submission",
    "change_submission": "Can change submission",
}


def create_group(apps, schema_editor):
    content_type, _ = apps.get_model("contenttypes", "ContentType").objects.get_or_create(
        app_label="{{ cookiecutter.project_slug }}", model="submission"
    )
    group, _ = apps.get_model("auth", "Group").objects.get_or_create(name=MODERATORS)
    for codename, name in PERMISSIONS.items():
        # Django creates permissions only after all migrations.
        permission, _ = apps.get_model("auth", "Permission").objects.get_or_create(
            content_type=content_type, codename=codename, defaults={"name": name}
        )
        group.permissions.add(permission)


def delete_group(apps, schema_editor):
    apps.get_model("auth", "Group").objects.filter(name=MODERATORS).delete()


class Migration(migrations.Migration):
    dependencies = [
        ("{{ cookiecutter.project_slug }}", "0002_seed_schedules"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]

    operations = [migrations.RunPython(create_group, delete_group)]
