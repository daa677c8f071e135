"use strict";

// Describes the selected crontab below the field.
{
  const $ = django.jQuery;
  const readable = JSON.parse($("#readable-crontabs").text());
  const words = $("<div>").appendTo(".field-crontab .help");
  const update = () => words.text(readable[$("#id_crontab").val()] ?? "");

  $(".field-crontab_translation").hide();
  $("#id_crontab").on("change", update);
  update();
}
