"""The JSON schema of recipes."""

from subquad.config import schema


def test_json_schema_accepts_lists_and_shorthand():
    tree = schema()
    definitions = tree["$defs"]
    for section, bare in (("Data", "string"), ("Student", "string"), ("MixtureSource", "number")):
        mapping, shorthand = definitions[section]["anyOf"]
        assert mapping["additionalProperties"] is False
        assert shorthand == {"type": bare}
    student = {"$ref": "#/$defs/Student"}
    assert tree["properties"]["student"]["anyOf"] == [student, {"type": "array", "items": student}]
    steps = {"type": "integer", "exclusiveMinimum": 0}
    assert definitions["Checkpoint"]["properties"]["save_steps"]["anyOf"] == [steps, {"type": "array", "items": steps}]


def test_every_key_of_the_json_schema_is_described():
    tree = schema()
    sections = [tree, *(section.get("anyOf", [section])[0] for section in tree["$defs"].values())]
    fields = {name: field for section in sections for name, field in section["properties"].items()}
    assert len(fields) > 50
    assert [name for name, field in fields.items() if len(field.get("description", "")) < 15] == []
