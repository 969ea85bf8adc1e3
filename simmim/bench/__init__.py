"""What a training takes of a machine: tables for people who plan one."""
