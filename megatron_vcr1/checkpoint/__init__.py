"""Hugging Face and Megatron checkpoints: conversion both ways, comparison, and loading into a sharded model."""
