"Packaging. Every value is read from `settings.ini`: change it there."
from configparser import ConfigParser
from pathlib import Path
from shlex import split

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(root/'settings.ini', encoding='utf-8')
ini = config['DEFAULT']
package = ini['lib_path']
readme = root/'README.md'

setup(
    name=ini['lib_name'],
    version=ini['version'],
    description=ini['description'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else ini['description'],
    long_description_content_type='text/markdown',
    author=ini['author'],
    author_email=ini['author_email'],
    url=ini['git_url'],
    license='Apache-2.0',
    keywords=ini['keywords'].split(),
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
    packages=[*find_packages(include=[package, f'{package}.*']), f'{package}.weights'],
    include_package_data=True,   # what MANIFEST.in lists inside these: the weights
    python_requires=f">={ini['min_python']}",
    install_requires=split(ini['requirements']),
    extras_require={k: split(ini[f'{k}_requirements']) for k in ('dev', 'hub', 'train')},
    entry_points={
        'console_scripts': split(ini['console_scripts']),
        'nbdev': [f'{package}={package}._modidx:d'],
    },
)
