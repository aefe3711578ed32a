"""Days of users: rows as they come, drawn by number, taken through every door and held to laws."""
